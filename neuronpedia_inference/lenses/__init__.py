"""What lenses need beside the model: Jacobians, from their files to the device."""
