from __future__ import annotations

import pytest
from running_products import touched_while_running

# Two batches: scores into R24 to R87, and R88 to R151 plus weights in R180 to R183 times values.
PRODUCTS = """
        /*0310*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;  /* 0x01 */
        /*0320*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;  /* 0x01 */
        /*0330*/                   HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR16].tnspB, R88, gsb0 ;  /* 0x01 */
"""
FIRST_DONE = "        /*0340*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;  /* 0x01 */\n"
ALL_DONE = "        /*0350*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;  /* 0x01 */\n"


def line(instruction):
    return f"        /*0400*/                   {instruction} ;  /* 0x01 */\n"


@pytest.mark.parametrize(
    "instruction",
    [
        "MUFU.EX2 R183, R2",
        "@!P0 FADD R2, R3, R151",
        "STS.128 [R2+UR4], R85",
        "LDG.E R2, desc[UR4][R150.64]",
        "IMAD.WIDE.U32 R23, R2, R3, R10",
        "IMAD.WIDE.U32 R20, P0, R2, R3, R23",
        "IMAD.WIDE.U32.X R20, R2, R3, R23, P0",
        "IMAD.WIDE R20, R2, R180, R10",
    ],
)
def test_what_takes_a_register_of_a_running_product_is_found(instruction):
    assert touched_while_running(PRODUCTS + line(instruction)) == [instruction.removeprefix("@!P0 ") + " "]
    assert touched_while_running(PRODUCTS + ALL_DONE + line(instruction)) == []


@pytest.mark.parametrize(
    "instruction",
    [
        "IMAD.WIDE.U32 R22, R2, R3, R10",
        "IMAD.WIDE R20, R23, 0x2, R10",
        "LDGSTS.E.BYPASS.128 [R21], desc[UR4][R22.64], P0",
        "STS.128 [R23+UR4], R4",
    ],
)
def test_the_registers_beside_those_of_a_product_are_free(instruction):
    assert touched_while_running(PRODUCTS + line(instruction)) == []


def test_a_wait_for_the_first_product_frees_its_registers_only():
    assert touched_while_running(PRODUCTS + FIRST_DONE + line("FADD R2, R24, R87")) == []
    assert touched_while_running(PRODUCTS + FIRST_DONE + line("FADD R180, R24, R87")) == ["FADD R180, R24, R87 "]
