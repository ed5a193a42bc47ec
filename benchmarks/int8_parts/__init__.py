"""What `benchmarks/int8.py` is made of; not a program."""
