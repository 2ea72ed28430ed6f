package main

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// imgJSON formats a value of map[string]any, []any, string, bool and integers
// as qemu-img prints JSON: four spaces of indentation, ASCII only, and the keys
// of an object in the order of QEMU's hash table.
func imgJSON(v any) string {
	var b strings.Builder
	writeJSON(&b, v, "\n")
	return b.String()
}

func writeJSON(b *strings.Builder, v any, newline string) {
	inner := newline + "    "
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for key := range v {
			keys = append(keys, key)
		}
		slices.SortFunc(keys, func(x, y string) int { return qdictBucket(x) - qdictBucket(y) })
		b.WriteByte('{')
		for i, key := range keys {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(inner)
			writeJSONString(b, key)
			b.WriteString(": ")
			writeJSON(b, v[key], inner)
		}
		b.WriteString(newline + "}")
	case []any:
		b.WriteByte('[')
		for i, element := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(inner)
			writeJSON(b, element, inner)
		}
		b.WriteString(newline + "]")
	case string:
		writeJSONString(b, v)
	default:
		fmt.Fprint(b, v)
	}
}

func writeJSONString(b *strings.Builder, s string) {
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case strings.ContainsRune("\b\f\n\r\t", r):
			b.WriteByte('\\')
			b.WriteByte("btn fr"[r-'\b'])
		case r >= 0x20 && r < 0x7f:
			b.WriteRune(r)
		case r > 0xffff && r != utf8.RuneError:
			r -= 0x10000
			fmt.Fprintf(b, "\\u%04X\\u%04X", 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(b, "\\u%04X", r)
		}
	}
	b.WriteByte('"')
}

// qdictBucket returns the place of a key in QEMU's dictionaries, which have 512
// buckets and are printed bucket by bucket.
func qdictBucket(key string) int {
	h := 0x238F13AF * uint32(len(key))
	for i := range len(key) {
		h += uint32(key[i]) << (i * 5 % 24)
	}
	return int((1103515243*h + 12345) % 512)
}
