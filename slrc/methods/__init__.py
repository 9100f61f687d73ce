"""Methods that train a model so that it can be pruned: one interface (`base`), one file each."""
