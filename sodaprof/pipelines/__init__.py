"""What is read off a diffusers pipeline: loading, sites, FLOPs, guidance, steps; recording and replaying runs."""
