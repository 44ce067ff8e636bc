"""The mini world: drawn scenes, instructions with exact plans and target pictures, small models of the real classes."""
