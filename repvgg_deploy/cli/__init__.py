"""The programs `repvgg-export` and `repvgg-trt`: one file a command. Each parses, calls one entry function and prints."""
