// Makes a library importable from Python: importing it is what registers its kernels
// (csrc/<op>/register.cpp in _C, register_cuda.cpp in _C_cuda).
#include <Python.h>

#define KD_TEXT(name) #name
#define KD_NAME(name) KD_TEXT(name)
#define KD_JOIN(prefix, name) prefix##name
#define KD_INIT(name) KD_JOIN(PyInit_, name)

// TORCH_EXTENSION_NAME is _C or _C_cuda: torch's build defines it.
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    KD_NAME(TORCH_EXTENSION_NAME),
    nullptr,
    -1,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

extern "C" __attribute__((visibility("default"))) PyObject* KD_INIT(TORCH_EXTENSION_NAME)() {
  return PyModule_Create(&definition);
}
