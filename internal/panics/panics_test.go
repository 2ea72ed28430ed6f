package panics

import (
	"errors"
	"strings"
	"testing"
)

func TestCatch(t *testing.T) {
	broken := errors.New("broken")
	if v, err := Catch(func() (int, error) { return 7, broken }); v != 7 || err != broken {
		t.Errorf("got %d, %v, want what the function returned", v, err)
	}
	_, err := Catch(func() (int, error) { panic("bug") })
	var caught *Error
	if !errors.As(err, &caught) || caught.Value != "bug" || !strings.Contains(caught.Stack, "TestCatch") {
		t.Errorf("got %#v, want the panic and where it was", err)
	}
}
