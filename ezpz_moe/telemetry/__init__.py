"""What a run reports about its experts: records, figures, alerts, pictures. Needs no host."""
