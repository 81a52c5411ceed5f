"""kdkernels inside other libraries; each module imports its library, nothing else imports them."""
