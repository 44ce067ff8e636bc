"""The mini world: drawn scenes, instructions with exact plans and exact target pictures, and small models of the real classes."""
