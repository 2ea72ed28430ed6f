package convert

import "csi-qcow2/qcow2"

// run returns the length of the first part of b, in whole granules of g bytes
// counted from offset off, that is all zero or all data, and which it is.
func run(b []byte, off, g int64) (n int, zero bool) {
	next := func(at int) int { return min(len(b), at+int(g-(off+int64(at))%g)) }
	end := next(0)
	zero = qcow2.IsZero(b[:end])
	for end < len(b) {
		n := next(end)
		if qcow2.IsZero(b[end:n]) != zero {
			break
		}
		end = n
	}
	return end, zero
}
