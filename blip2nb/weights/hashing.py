"""One hash for a tensor's content, the same wherever it is computed.

Used by the converter and, in the LAVIS environment, by the recorder, so it stands alone: torch only, Python 3.8.
"""

import hashlib

import torch

# safetensors' names of the dtypes a checkpoint may hold
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def tensor_bytes(tensor):
    """The tensor's bytes in row-major order, as a buffer that shares its memory where it can. CPU only."""
    plain = tensor.detach().contiguous().flatten()
    if plain.numel() < 2:  # which may keep a stride of 0
        plain = plain.clone(memory_format=torch.contiguous_format).reshape(plain.numel())
    return memoryview(plain.view(torch.uint8).numpy())


def sha256_of(tensor):
    """ "DTYPE:sha256" over shape and bytes. Two tensors have the same digest when they are bit-identical.

    >>> sha256_of(torch.zeros(2))[:8]
    'F32:d374'
    """
    name = DTYPE_NAMES[tensor.dtype]
    sha = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    sha.update(tensor_bytes(tensor))
    return "{}:{}".format(name, sha.hexdigest())


def sha256_as(tensor, like):
    """The digest of `tensor` cast to the dtype that the digest `like` names, or None if that cast would lose bits.

    Lets a float32 parameter be compared with the float16 tensor it was loaded from.
    """
    dtype = DTYPES[like.split(":", 1)[0]]
    if tensor.dtype == dtype:
        return sha256_of(tensor)
    cast = tensor.to(dtype)
    return sha256_of(cast) if torch.equal(cast.to(tensor.dtype), tensor) else None


def sha256_of_all(digests):
    """One hash for many tensors: of a mapping name -> digest, whatever its order."""
    sha = hashlib.sha256()
    for name in sorted(digests):
        sha.update("{} {}\n".format(name, digests[name]).encode())
    return sha.hexdigest()
