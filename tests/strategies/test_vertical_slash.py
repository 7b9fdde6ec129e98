from __future__ import annotations

import torch

from diffsparse.strategies.vertical_slash import block_mass, column_mass, columns_and_diagonals, diagonal_mass


def test_columns_and_diagonals_sum_the_attention_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 6, generator=generator) for n in (4, 22))
    row_blocks = torch.tensor([0, 2, 2, 4])
    length = torch.tensor([22, 18])
    mass = block_mass(query, key, 5, length)
    columns, diagonals = column_mass(mass), diagonal_mass(mass, row_blocks)
    for element in range(2):
        for head in range(3):
            keys = key[element, head, : length[element]]
            column, diagonal = [0.0] * 5, [0.0] * 9
            for row, block in enumerate(row_blocks.tolist()):
                weights = (keys @ query[element, head, row]).softmax(0)
                for token, weight in enumerate(weights.tolist()):
                    column[token // 5] += weight / 4
                    diagonal[token // 5 - block + 4] += weight / 4
            assert torch.allclose(columns[element, head], torch.tensor(column), atol=1e-6)
            assert torch.allclose(diagonals[element, head], torch.tensor(diagonal), atol=1e-6)


def test_a_block_is_seen_if_its_column_or_its_diagonal_is_kept():
    generator = torch.Generator().manual_seed(0)
    columns, diagonals = (torch.rand(2, n, generator=generator) < 0.3 for n in (5, 9))
    visible = columns_and_diagonals(columns, diagonals)
    for head in range(2):
        for q in range(5):
            for k in range(5):
                assert visible[head, q, k] == (columns[head, k] or diagonals[head, k - q + 4])
