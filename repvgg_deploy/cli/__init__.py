"""The command line programs `repvgg-export` and `repvgg-trt`."""
