"""The diffusion Schrodinger bridge: its motion, and the model that asks it for evidence."""

from endoprint.models.bridge.model import Bridge, BridgeConfig

__all__ = ["Bridge", "BridgeConfig"]
