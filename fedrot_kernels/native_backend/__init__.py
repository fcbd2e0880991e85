"""The kernels in C++, for the CPU. The library is optional: it is built where there is a compiler."""
