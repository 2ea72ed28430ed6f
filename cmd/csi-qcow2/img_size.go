package main

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Faults of a size on the command line.
var (
	errSizeSyntax = errors.New("not a size")
	errSizeRange  = errors.New("size out of range")
)

// parseSize parses a size as QEMU does: a decimal or hexadecimal number of
// bytes, or a decimal one, with a fraction perhaps, and a suffix. It must be
// less than 2^64.
func parseSize(s string) (uint64, error) {
	number := strings.TrimSuffix(s, "b")
	number = strings.TrimSuffix(number, "B")
	if len(s)-len(number) > 1 {
		return 0, errSizeSyntax
	}
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		n, err := strconv.ParseUint(hex, 16, 64)
		if errors.Is(err, strconv.ErrRange) {
			return 0, errSizeRange
		}
		if err != nil || strings.Contains(hex, "_") {
			return 0, errSizeSyntax
		}
		return n, nil
	}
	shift := uint(0)
	if number == s && s != "" {
		if i := strings.IndexByte("kmgtpe", s[len(s)-1]|0x20); i >= 0 {
			shift, number = uint(i+1)*10, s[:len(s)-1]
		}
	}
	whole, fraction, dotted := strings.Cut(number, ".")
	if !digits(whole) || whole == "" && fraction == "" || !digits(fraction) {
		return 0, errSizeSyntax
	}
	n, err := strconv.ParseUint("0"+whole, 10, 64)
	if err != nil {
		return 0, errSizeRange
	}
	hi, n := bits.Mul64(n, 1<<shift)
	if hi != 0 {
		return 0, errSizeRange
	}
	if !dotted || strings.Trim(fraction, "0") == "" {
		return n, nil
	}
	if shift == 0 {
		return 0, errSizeSyntax // part of a byte
	}
	part, err := strconv.ParseFloat("0."+fraction, 64)
	if err != nil {
		return 0, errSizeSyntax
	}
	n, carry := bits.Add64(n, uint64(part*float64(uint64(1)<<shift)), 0)
	if carry != 0 {
		return 0, errSizeRange
	}
	return n, nil
}

func digits(s string) bool { return strings.Trim(s, "0123456789") == "" }

// imgSize parses the argument of an option that what describes, from 0 to limit.
func (c *imgContext) imgSize(s, what string, limit int64) (int64, error) {
	n, err := parseSize(s)
	switch {
	case errors.Is(err, errSizeSyntax):
		c.errorf("Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what)
		return 0, imgErrorf("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
	case err != nil || n > uint64(limit):
		return 0, imgErrorf("Invalid %s specified. Must be between 0 and %d.", what, limit)
	}
	return int64(n), nil
}

// humanSize formats n as QEMU does: three digits and a binary unit.
func humanSize(n int64) string {
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	unit := max(exp-1, 0) / 10
	units := [...]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}
	return fmt.Sprintf("%.3g %sB", float64(n)/float64(uint64(1)<<(unit*10)), units[unit])
}
