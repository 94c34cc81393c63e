"""What a run reports of its experts: records, figures, scalars, alerts and pictures, host-free."""
