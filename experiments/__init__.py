"""The paper's Section 4, and what measures or draws: python -m experiments... in the checkout."""
