package fallback

import (
	"context"
	"errors"
	"testing"

	"cacheproxy/policy"
)

func nothing(context.Context) error { return nil }

func TestAFenceKillsWhatIsStored(t *testing.T) {
	s := open(t)
	a, b, gone := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "q", Key: "b"}, policy.Ref{Route: "r", Key: "gone"}
	fill := func() {
		write(t, s, lasting(put(a, "1"), policy.ExpiresIn, 60_000), put(b, "2"), policy.Change{Ref: gone, Op: policy.Delete})
	}
	look := func(want string) {
		t.Helper()
		if got := states(read(t, s, a, b, gone)); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		tx := begin(t, s, []policy.Ref{a, b, gone})
		if got := states(tx.Rows()); got != want {
			t.Errorf("a transaction sees %s, want %s", got, want)
		}
		tx.Rollback()
	}
	fill()
	look("LLT")
	must(t, s.Fence(testContext(t), "r", nothing))
	look("ALA")
	// A row that a fence has killed keeps nothing, and one that is written after it lives.
	write(t, s, lasting(put(a, "new"), policy.KeepExpiry, 0))
	if row := read(t, s, a)[0]; row.State != policy.Live || row.TTL != -1 {
		t.Errorf("%+v", row)
	}
	look("LLA")
	must(t, s.Fence(testContext(t), "", nothing))
	look("AAA")
	fill()
	look("LLT")
	must(t, s.Fence(testContext(t), "q", nothing))
	must(t, s.Fence(testContext(t), "q", nothing))
	look("LAT")
	// A key that moves to another route: its row stays dead if the old route was fenced, and dies with the new one.
	if got := states(read(t, s, policy.Ref{Route: "other", Key: "b"}, policy.Ref{Route: "other", Key: "a"}, policy.Ref{Route: "q", Key: "a"})); got != "ALA" {
		t.Error(got)
	}
	fill()
	look("LLT")
}

func TestAFailedFenceChangesNothing(t *testing.T) {
	s := open(t)
	k := policy.Ref{Route: "r", Key: "k"}
	write(t, s, put(k, "v"))
	oops := errors.New("oops")
	if err := s.Fence(testContext(t), "", func(context.Context) error { return oops }); err != oops {
		t.Error(err)
	}
	if got := states(read(t, s, k)); got != "L" {
		t.Error(got)
	}
	func() {
		defer func() { _ = recover() }()
		_ = s.Fence(testContext(t), "", func(context.Context) error { panic("oops") })
	}()
	if got := states(read(t, s, k)); got != "L" || s.Stats().InUse != 0 {
		t.Error(got, s.Stats())
	}
}

func TestAFenceWaitsForTransactionsAndKeepsThemOut(t *testing.T) {
	s := open(t)
	other := twin(t, s, nil)
	k := refs("r", "k")
	tx := begin(t, s, k)
	inside, leave := make(chan struct{}), make(chan struct{})
	fenced := make(chan error, 1)
	go func() {
		fenced <- other.Fence(testContext(t), "", func(context.Context) error {
			close(inside)
			<-leave
			return nil
		})
	}()
	blocked(t, s, 1) // the fence waits for the transaction
	select {
	case <-inside:
		t.Fatal("the fence did not wait")
	default:
	}
	_, err := tx.Commit(testContext(t), []policy.Change{put(k[0], "before")}, CommitOptions{})
	must(t, err)
	<-inside
	began := make(chan *Tx)
	go func() {
		tx, err := s.Begin(testContext(t), k)
		if err != nil {
			t.Error(err)
		}
		began <- tx
	}()
	blocked(t, s, 1) // the next transaction waits for the fence; readers do not
	if got := states(read(t, s, k[0])); got != "L" {
		t.Error(got)
	}
	close(leave)
	must(t, <-fenced)
	tx = <-began
	if tx == nil {
		return
	}
	defer tx.Rollback()
	if got := states(tx.Rows()); got != "A" {
		t.Error(got)
	}
	_, err = tx.Commit(testContext(t), []policy.Change{put(k[0], "after")}, CommitOptions{})
	must(t, err)
	if got := states(read(t, s, k[0])); got != "L" {
		t.Error(got)
	}
}

func TestLiftRaisesTheNumber(t *testing.T) {
	s := open(t)
	number := func() int64 {
		tx := begin(t, s, refs("r", "k"))
		defer tx.Rollback()
		return tx.Number()
	}
	lift := func(above int64, want bool) {
		t.Helper()
		if lifted, err := s.Lift(testContext(t), above); err != nil || lifted != want {
			t.Errorf("lifted to %d: %v, %v", above, lifted, err)
		}
	}
	first := number()
	lift(first+1000, true)
	second := number()
	if second <= first+1000 {
		t.Errorf("%d after a lift to %d", second, first+1000)
	}
	lift(1, false)
	if n := number(); n <= second {
		t.Errorf("%d after %d", n, second)
	}
}
