"""The programs `repvgg-export` and `repvgg-trt`: one file a command, which parses, calls one entry function and prints."""
