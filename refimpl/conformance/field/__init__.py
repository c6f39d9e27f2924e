"""The judge of the field: kernels that other projects released, under the laws of the suite, one command for
all of them.

    python -m refimpl.conformance.field                       all that are installed
    python -m refimpl.conformance.field --only 'kt-kernel*'   some of them
    python -m refimpl.conformance.field --history             bugs that such kernels had, planted again

    contenders           which kernels, of which package, and what each declares of itself
    blocks floats products models    adapters: a package's function as the reference's arguments want it
    history              bugs from the public trackers, planted in this project's own code
    page                 the verdicts as docs/field.md

A package that is not installed is one line, "not here". Adapters convert arrays and nothing else.
"""
