"""The papers' ablations: what differs between the arms, what the papers measured, and what the runs here did."""
