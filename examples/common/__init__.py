"""What examples of tasks other than classification share: metrics and readers."""
