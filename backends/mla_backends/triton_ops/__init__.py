"""The project's own GPU kernels in Triton, offered through the op contract. Imported by plugins; Triton only
when a layer is built."""
