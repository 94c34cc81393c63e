"""Bind the plugin to the trainer: one class for each generation of torchtitan.

``host``          what the plugin asks of a trainer, and so what a new binding has to provide
``parts``         what a trainer may lack
``detect``        finds out which host is installed
``jobs``          reads jobs with the keys of the installed host
``titan``         torchtitan since 0.3: the code its generations share, and a class for each
``titan_0_2``     torchtitan 0.2
``cpu``           runs the host without an accelerator: the only module that patches anything

The other modules are shared by the bindings. Only modules below this package import torchtitan.
The modules directly in it import neither torchtitan nor torch on their own.
"""
