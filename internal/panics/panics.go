package panics

import (
	"fmt"
	"runtime/debug"
)

// An Error is a panic that was caught.
type Error struct {
	Value any
	Stack string // of the goroutine, where it panicked
}

func (e *Error) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// Catch runs fn. A panic becomes an *Error.
func Catch[T any](fn func() (T, error)) (value T, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Error{v, string(debug.Stack())}
		}
	}()
	return fn()
}
