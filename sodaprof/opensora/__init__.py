"""Open-Sora v1.2 as diffusers parts: the STDiT3 network and its rectified-flow scheduler."""
