"""Problems for Triton kernels, in memory that shows what a kernel should not have touched.

Whatever belongs to nobody is NaN, or a page that does not exist; outputs lie in memory that must stay as it
is. `wrong(...)` of a problem runs an op on it and says what is wrong with the result, compared with float64.
"""
