"""What a model is and costs, in closed form: sizes, parameters, operations, memory under each ZeRO stage.

Arithmetic on integers. Imports core only and no torch, so that a run can be planned before anything is built.
"""
