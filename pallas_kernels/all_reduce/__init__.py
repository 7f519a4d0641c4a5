"""Sums over the GPUs of a mesh, alone or with the residual sum and RMSNorm that follow."""
