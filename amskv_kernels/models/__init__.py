"""VAR and its VQ-VAE for inference, and the stock cache they are compared with."""

from amskv_kernels.models.attention import Attention
from amskv_kernels.models.stock import ConcatKVCache
from amskv_kernels.models.var import VAR, Generation, VARConfig, filter_logits
from amskv_kernels.models.vqvae import VQVAE, VQVAEConfig

__all__ = ["VAR", "VQVAE", "Attention", "ConcatKVCache", "Generation", "VARConfig", "VQVAEConfig", "filter_logits"]
