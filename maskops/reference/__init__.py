"""Plain PyTorch versions of every op, forward and explicit backward: the definition of what the kernels compute.

They are written to be obviously right, not fast. Every function has the name and the arguments of the op that it defines.
"""
