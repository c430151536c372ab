"""What a person sees of sweeps: the page of one, the page over all, the arms' pictures. No torch and no Ray."""
