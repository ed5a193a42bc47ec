"""The programs `repvgg-export` and `repvgg-trt`: one file a command, with its options, its work and what it prints."""
