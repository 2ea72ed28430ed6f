package meter

import (
	"testing"
	"time"
)

// TestBucketOf: a bound belongs to the bucket that it ends.
func TestBucketOf(t *testing.T) {
	for i := range Buckets - 1 {
		if got := bucketOf(Bound(i)); got != i {
			t.Errorf("%s is in bucket %d, want %d", Bound(i), got, i)
		}
		if got := bucketOf(Bound(i) + 1); got != i+1 {
			t.Errorf("%s is in bucket %d, want %d", Bound(i)+1, got, i+1)
		}
	}
	for took, want := range map[time.Duration]int{-1: 0, 0: 0, 1: 0, time.Hour: Buckets - 1} {
		if got := bucketOf(took); got != want {
			t.Errorf("%s is in bucket %d, want %d", took, got, want)
		}
	}
}
