"""The Triton backend, installed as `maskops.kernels`.

One module (or folder) per op family, with one launcher per op: same name, same arguments as the op's schema.
Nothing is imported here, so that `import maskops` never needs Triton.
"""

if __name__ == "kernels":
    # The repository root on sys.path would otherwise hide Hugging Face's package of that name.
    raise ImportError("import maskops.kernels")
