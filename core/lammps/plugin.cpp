// What LAMMPS calls when it loads the plugin.
#include <cstdio>

#include "lammps.h"
#include "pair_potstill.h"
#include "pair_potstill_python.h"

template <class Style>
static void *make_pair(void *lammps) {
    return new Style(static_cast<LAMMPS_NS::LAMMPS *>(lammps));
}

// Of LAMMPS' lammpsplugin.h, which installations do not bring along.
extern "C" {
typedef void *(lammpsplugin_factory1)(void *);
typedef void *(lammpsplugin_factory2)(void *, int, char **);
typedef struct {
    const char *version, *style, *name, *info, *author;
    union {
        lammpsplugin_factory1 *v1;
        lammpsplugin_factory2 *v2;
    } creator;
    void *handle;
} lammpsplugin_t;
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t *, void *);

int lammps_version(void *lammps);  // of LAMMPS' C library, the same in all versions

__attribute__((visibility("default"))) void lammpsplugin_init(void *lammps, void *handle, void *regfunc) {
    // Classes of another version have another layout: nothing of them may be touched.
    const int found = lammps_version(lammps);
    if (found != POTSTILL_LAMMPS_VERSION) {
        std::fprintf(stderr,
                     "ERROR: the plugin of potstill was built for LAMMPS %d, but this is LAMMPS %d: build it "
                     "again with `potstill lammps build`\n",
                     POTSTILL_LAMMPS_VERSION, found);
        return;
    }
    lammpsplugin_t plugin{};
    plugin.version = static_cast<LAMMPS_NS::LAMMPS *>(lammps)->version;
    plugin.style = "pair";
    plugin.name = "potstill";
    plugin.info = "pair style potstill, of potstill " POTSTILL_VERSION;
    plugin.author = "The potstill developers";
    plugin.creator.v1 = &make_pair<LAMMPS_NS::PairPotstill>;
    plugin.handle = handle;
    reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lammps);
    plugin.name = "potstill/python";
    plugin.info = "pair style potstill/python, of potstill " POTSTILL_VERSION;
    plugin.creator.v1 = &make_pair<LAMMPS_NS::PairPotstillPython>;
    reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lammps);
}
}
