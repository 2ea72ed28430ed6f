package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

// runLine runs l in turns.
func (e *env) runLine(ctx context.Context, l *line) (result, error) {
	r := result{
		Line: l.name, Group: l.group, Title: l.title, Unit: l.unit, Note: l.note, Limit: l.limit,
		Machine: e.machine, When: time.Now().UTC().Truncate(time.Second),
	}
	if err := e.warmUp(); err != nil {
		return r, fmt.Errorf("warm up: %w", err)
	}
	if l.setup != nil {
		undo, err := l.setup(ctx, e)
		if err != nil {
			return r, fmt.Errorf("prepare: %w", err)
		}
		defer undo()
	}
	var turn []contestant
	if l.curve != nil {
		turn = r.addCurve(l.curve)
	} else {
		turn = append(turn, l.ours)
		r.Series = append(r.Series, series{Name: l.ours.name})
		for _, p := range l.peers {
			c, err := e.best(ctx, l, p)
			if err != nil {
				return r, err
			}
			turn = append(turn, c)
			s := series{Name: p.name, Target: p.target}
			if c.name != p.name {
				s.Variant = c.name
			}
			r.Series = append(r.Series, s)
		}
	}
	for round := range e.pairs {
		for i, c := range turn {
			e.say("%s: round %d of %d: %s", l.name, round+1, e.pairs, c.name)
			figure, err := e.once(ctx, c)
			if err != nil {
				return r, err
			}
			r.Series[i].Samples = append(r.Series[i].Samples, figure)
		}
	}
	e.say("")
	return r, nil
}

// best returns the choice of p that does best in one turn.
func (e *env) best(ctx context.Context, l *line, p peer) (contestant, error) {
	best, record := p.choices[0], 0.0
	if len(p.choices) == 1 || !e.scout {
		return best, nil
	}
	for _, c := range p.choices {
		e.say("%s: looking for the %s: %s", l.name, p.name, c.name)
		figure, err := e.once(ctx, c)
		if err != nil {
			return best, err
		}
		if record == 0 || l.unit.ratio(figure, record) > 1 {
			best, record = c, figure
		}
	}
	return best, nil
}

// once lets c do its work once.
func (e *env) once(ctx context.Context, c contestant) (float64, error) {
	figure, err := c.run(ctx, e)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.name, err)
	}
	if figure <= 0 {
		return 0, fmt.Errorf("%s: figure %v: the work was not done", c.name, figure)
	}
	return figure, nil
}

// say shows what is going on, where a person looks on.
func (e *env) say(format string, args ...any) {
	if e.terminal {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
	}
}
