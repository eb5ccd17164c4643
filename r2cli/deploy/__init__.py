"""Files: what is written for each runtime, the engines that run it, and the proof that it is the network."""
