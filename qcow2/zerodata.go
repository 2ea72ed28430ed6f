package qcow2

import "bytes"

// zeroPage is what zero data is compared with: it stays in the processor's
// first cache, and bytes.Equal compares whole vectors.
var zeroPage [4096]byte

// IsZero reports whether b holds only zeroes.
func IsZero(b []byte) bool {
	// Data mostly shows in its first bytes, in the middle or at the end.
	if n := len(b); n > 0 && b[0]|b[n/2]|b[n-1] != 0 {
		return false
	}
	for len(b) > len(zeroPage) {
		if !bytes.Equal(b[:len(zeroPage)], zeroPage[:]) {
			return false
		}
		b = b[len(zeroPage):]
	}
	return bytes.Equal(b, zeroPage[:len(b)])
}
