"""Store a class of one's own without pickle: its state goes to disk, its arrays as they are."""

import numpy as np

from fbcache import FBPool, register


class Spectrum:
    """A signal, known by its frequencies."""

    def __init__(self, rate: float, amplitudes: np.ndarray) -> None:
        self.rate = rate
        self.amplitudes = amplitudes

    @property
    def peak(self) -> float:
        """The loudest frequency, in hertz."""
        return float(self.rate * np.argmax(np.abs(self.amplitudes)) / (2 * (len(self.amplitudes) - 1)))


register(
    Spectrum,
    encode=lambda spectrum: (spectrum.rate, spectrum.amplitudes),
    decode=lambda state: Spectrum(*state),
    name="spectrum",
)


def main() -> None:
    """Keep spectra of 50 tones, several times what fits."""
    rate = 44_100.0
    moments = np.arange(44_100) / rate
    with FBPool("4MB") as pool:
        for tone in range(100, 150):
            pool.put(tone, Spectrum(rate, np.fft.rfft(np.sin(2 * np.pi * tone * moments))))
        pool.evict()
        wrong = []
        for tone in pool:
            with pool.get(tone) as spectrum:
                if spectrum.peak != tone:
                    wrong.append(tone)
        print(f"{len(pool)} spectra, {len(wrong)} wrong, {pool.stats().loads} read from disk")


if __name__ == "__main__":
    main()
