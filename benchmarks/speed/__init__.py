"""What the speed benchmarks share: timing, reports, the compared designs, ceilings of the hardware, random models."""
