package cache

import (
	"fmt"
	"testing"
)

func TestPassOrderAndSyncs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		dirty map[Class][]int64
		want  string
	}{
		{"nothing", nil, "[s]"},
		{"class 0", map[Class][]int64{0: {8192}}, "[w 0x2000+4096 s]"},
		{"class 2", map[Class][]int64{2: {8192}}, "[s w 0x2000+4096 s]"},
		{"classes 0 and 2", map[Class][]int64{0: {8192}, 2: {0}}, "[w 0x2000+4096 s w 0x0+4096 s]"},
		{"classes 0, 2 and 3", map[Class][]int64{0: {8192}, 2: {0}, 3: {4096}},
			"[w 0x2000+4096 s w 0x0+4096 s w 0x1000+4096 s]"},
		{"all classes", map[Class][]int64{0: {0x3000}, 1: {0x2000}, 2: {0x1000}, 3: {0}},
			"[w 0x3000+4096 s w 0x2000+4096 s w 0x1000+4096 s w 0x0+4096 s]"},
		{"adjacent", map[Class][]int64{0: {0x5000, 0x1000, 0x2000, 0x8000, 0x4000}},
			"[w 0x1000+8192 w 0x4000+8192 w 0x8000+4096 s]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newRecorder(0)
			h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 4})
			for class, offs := range tt.dirty {
				for _, off := range offs {
					store(t, h, class, off, 0, uint64(off)+1)
				}
			}
			mark := h.Mark()
			writeBack(t, h)
			if got := fmt.Sprint(f.take()); got != tt.want {
				t.Errorf("operations %s, want %s", got, tt.want)
			}
			for _, offs := range tt.dirty {
				for _, off := range offs {
					if got := f.word(off); got != uint64(off)+1 {
						t.Errorf("file at %#x holds %d, want %d", off, got, off+1)
					}
				}
			}
			if h.DirtyTables() != 0 || h.Done() < mark {
				t.Errorf("%d dirty tables, done %d, mark %d", h.DirtyTables(), h.Done(), mark)
			}
			writeBack(t, h)
			if got := fmt.Sprint(f.take()); got != "[s]" {
				t.Errorf("second pass: %s, want one sync", got)
			}
		})
	}
}
