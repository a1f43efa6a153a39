"""The plan: one frozen record, and its file."""

import sftplan

# Importing this package rebinds `sftplan.plan` from the function to the package.
sftplan.make_callable(__name__)
