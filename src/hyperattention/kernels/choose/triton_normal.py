"""Standard normal numbers from hashed bits in Triton: `random.normal` for a few numbers, to the last bit of float32."""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _middle(x):
    """Invert the normal distribution between e^-2 and 1 - e^-2, of which `x` is the distance from 1/2."""
    y = x * x
    # a literal beside a number of 64 bits has as many; one with a name has 32
    p = y * -59.9633501014107895267 + 98.0010754185999661536
    p = p * y + -56.6762857469070293439
    p = p * y + 13.9312609387279679503
    p = p * y + -1.23916583867381258016
    q = y + 1.95448858338141759834
    q = q * y + 4.67627912898881538453
    q = q * y + 86.3602421390890590575
    q = q * y + -225.462687854119370527
    q = q * y + 200.260212380060660359
    q = q * y + -82.0372256168333339912
    q = q * y + 15.9056225126211695515
    q = q * y + -1.18331621121330003142
    return (x + x * (y * p / q)) * 2.50662827463100050242


@triton.jit
def _tail(x):
    """Invert it below e^-2, down to e^-32; negative."""
    far = tl.sqrt(-2.0 * tl.log(x))
    z = 1.0 / far
    p = z * 4.05544892305962419923 + 31.5251094599893866154
    p = p * z + 57.1628192246421288162
    p = p * z + 44.0805073893200834700
    p = p * z + 14.6849561928858024014
    p = p * z + 2.18663306850790267539
    p = p * z + -0.140256079171354495875
    p = p * z + -0.0350424626827848203418
    p = p * z + -0.000857456785154685413611
    q = z + 15.7799883256466749731
    q = q * z + 45.3907635128879210584
    q = q * z + 41.3172038254672030440
    q = q * z + 15.0425385692907503408
    q = q * z + 2.50464946208309415979
    q = q * z + -0.142182922854787788574
    q = q * z + -0.0380806407691578277194
    q = q * z + -0.000933259480895457427372
    return z * p / q - (far - tl.log(far) / far)


@triton.jit
def normal_of(bits):
    """Invert the normal distribution at the middle of a step of 2^-32: see Cephes' `ndtri`, which torch follows."""
    y = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    low = tl.minimum(y, 1.0 - y)
    outer = _tail(tl.minimum(low, 0.14))
    return tl.where(low > 0.13533528323661269189, _middle(y - 0.5), tl.where(y < 0.5, outer, -outer))
