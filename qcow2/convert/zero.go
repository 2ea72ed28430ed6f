package convert

import "bytes"

// zeroPage is what zero data is compared with: it stays in the processor's
// first cache, and bytes.Equal compares whole vectors.
var zeroPage [4096]byte

// isZero reports whether b holds only zeroes.
func isZero(b []byte) bool {
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

// run returns the length of the first part of b, in whole granules of g bytes
// counted from offset off, that is all zero or all data, and which it is.
func run(b []byte, off, g int64) (n int, zero bool) {
	next := func(at int) int { return min(len(b), at+int(g-(off+int64(at))%g)) }
	end := next(0)
	zero = isZero(b[:end])
	for end < len(b) {
		n := next(end)
		if isZero(b[end:n]) != zero {
			break
		}
		end = n
	}
	return end, zero
}
