"""The paper's Section 4 and what measures or draws: run as python -m experiments... in the checkout."""
