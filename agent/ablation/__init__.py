"""GenDataAgent's ablations: what differs between the arms, what the paper measured, and what the runs here did."""
