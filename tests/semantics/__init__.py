"""``make semantics``: what each way of consuming makes of each fault, counted on real servers."""
