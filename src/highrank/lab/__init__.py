"""The ablation lab: sweeps, learning-rate searches, reports, the TensorBoard dashboard."""
