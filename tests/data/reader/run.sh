#!/bin/bash
torchrun -m torchtitan.train --training.steps 5 --optimizer.beta1 0.9
